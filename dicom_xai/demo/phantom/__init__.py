"""Synthetic studies with known truth: complete DICOM objects, and a mask for every lesion.

Tests, demo, benchmarks and evaluation all draw from here. Nothing is anatomy to learn from: the
phantoms have what a small model needs to be right or wrong about, and nothing of any patient.

Rules: everything random comes from the numpy Generator that is passed in, so that a seed gives the
same pixels; UIDs are fresh unless a source of UIDs is passed in. No torch, no network.
"""

from dicom_xai.demo.phantom.chest import chest
from dicom_xai.demo.phantom.dataset import Phantom, Subject, fresh_uid, to_bytes
from dicom_xai.demo.phantom.head import HAEMORRHAGE, head_ct
from dicom_xai.demo.phantom.thorax import CHEST_FINDINGS

__all__ = [
    "CHEST_FINDINGS",
    "HAEMORRHAGE",
    "Phantom",
    "Subject",
    "chest",
    "fresh_uid",
    "head_ct",
    "to_bytes",
]
