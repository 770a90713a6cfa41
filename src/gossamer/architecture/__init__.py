"""What a model is made of: the anatomy of a block, and one file for each family."""
