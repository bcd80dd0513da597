"""Distillation methods: losses computed from the student's logits, the labels and the teacher's targets."""
