"""Other programs' formats, read into what a Hugging Face directory holds."""
