"""Data sets: every form an image folder comes in, opened, checked and written."""
