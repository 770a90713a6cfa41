"""The .goss file: `docs/format.md` specifies it, this folder executes the specification."""
