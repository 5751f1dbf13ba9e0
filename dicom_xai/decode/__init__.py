"""Stored bytes become frames, frames become a volume, a frame becomes a model's input.

`pixels` (bytes to stored values, without torch), `frames` (to modality units on the device),
`geometry` (frames to `Volume`), `normalize` (a frame to the model's grid, or to what a radiologist
sees). Training uses the same functions as serving.
"""
