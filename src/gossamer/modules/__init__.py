"""transformers' own layers, one at a time: the walk through a decoder's or an encoder's."""
