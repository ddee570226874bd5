"""How the pocket model is made: from a scripted expert's transcripts to weights, tokenizer and model card."""
