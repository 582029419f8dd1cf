"""What pgchannels costs and how fast it is: ``python -m benchmarks``, or ``make bench``.

Nothing here is compared over time or between machines. Each benchmark runs its variants in turns,
in one go and on one server, so that what disturbs one disturbs the others: read the ratios first.
"""
