"""The public import path of `fastofa.data.open.open_dataset`."""

from fastofa.data.open import open_dataset as open_dataset
