"""Supervised fine-tuning: configuration (`config`), order of samples (`order`), batches (`collator`), the model and its
losses (`model`, `losses`), HF Trainer (`trainer`), and a run of all of it (`run`)."""
