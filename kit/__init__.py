"""What a script needs around its mathematics. Nothing in this folder comes from a paper."""
