"""What `qualify.py` measures, one module a question; pickled by value, so that nodes need not see the checkout."""
