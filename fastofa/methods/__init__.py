"""Distillation methods: losses of the student's logits, the labels and the teacher's targets."""
