"""Files of pictures and of labels: readers and writers of their formats."""
