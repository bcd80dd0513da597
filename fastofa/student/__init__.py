"""The student: a timm model, its four stages and an exit at each."""
