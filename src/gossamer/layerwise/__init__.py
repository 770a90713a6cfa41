"""What stages do to a decoder one layer at a time; `gossamer.modules.decoder` has the layers."""
