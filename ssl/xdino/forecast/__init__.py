"""What a run will cost and what it should be, before it starts.

`survey` looks at all images, `facts` at a sample of them and at the machine; `rates` trains a few
steps and times them; `choices` makes a recipe of these and of the time there is, from the networks of
`ladder`, and `fitting` lays its epochs into that time. `costs` counts what a step computes and keeps,
`machines` says what that takes on a device, `outlook` puts a run's hours, memory and disk together.
"""
