"""A job's events: the publisher appends them, the stream replays and follows them."""
