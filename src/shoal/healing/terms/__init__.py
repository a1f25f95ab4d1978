"""What training minimises, one formula a file; found by the file name."""
