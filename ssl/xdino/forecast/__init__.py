"""What a run will cost and what it should be, before it starts.

`rates` trains a few steps and times them, `images` looks at a sample of the pictures, `choices` makes
a recipe of both and of the time there is, `fitting` lays its epochs into that time.
"""
