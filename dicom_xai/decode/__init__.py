"""Stored bytes become frames, frames become a volume, a volume becomes a model's input.

`pixels` (bytes to stored values) and `planes` (a header to plane records) need no torch; neither
does `geometry` (plane records to the one `Stack`). `frames` (stored values to modality units on the
device), `normalize` (frames to the model's grid, or to what a radiologist sees). Training uses the
same functions as serving.
"""
