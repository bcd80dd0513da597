"""Datasets: open, check and write every form in which an image folder comes."""
