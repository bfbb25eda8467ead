"""The tiny example model: scenes, tokenizer, training stages, evaluation."""
