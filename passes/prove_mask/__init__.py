"""A symbolic proof of what a mask says: `prove.py` is the entry; `element.py` explains the method."""
