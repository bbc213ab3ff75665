"""What a run will cost and what it should be, before it starts.

`survey` looks at the images, `costs` counts what a step computes and keeps, `machines` says what that
takes on a device, `outlook` puts a run's hours, memory and disk together, `rates` trains a few steps
and times them.
"""
