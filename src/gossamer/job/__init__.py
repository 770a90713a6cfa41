"""What a verb is made of: its options, its reports, its processes."""
