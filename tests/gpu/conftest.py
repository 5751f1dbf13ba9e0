"""Comparisons with the CPU need float32 products; times are taken in a process of their own."""

import os

# NVIDIA's libraries read it when they load: whatever a session asks for, no TF32 in this process.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
