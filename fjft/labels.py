"""What stands where there is nothing to learn."""

IGNORED = -100  # Hugging Face's label for "not trained"
