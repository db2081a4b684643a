"""Readers and writers of files with pictures and labels."""
