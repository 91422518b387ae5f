"""Networks, one architecture per file in neutral folders, and how each is called (`calling.py`)."""
