"""Supervised fine-tuning: examples to batches (`collator`), training-only losses (`losses`), HF Trainer (`trainer`)."""
