"""What stages do to a decoder one layer at a time; `gossamer.decoder` has the layers."""
