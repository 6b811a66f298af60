"""Labelled images: where they are read from and how they are split."""

from trtdeploy.data.dataset import Dataset, Split, open_dataset

__all__ = ["Dataset", "Split", "open_dataset"]
