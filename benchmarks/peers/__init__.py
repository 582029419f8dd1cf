"""Other processes that take part: each is a module that runs by itself and does as it is asked."""
