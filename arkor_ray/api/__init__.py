"""The control plane over HTTP: the arkor wire's routes, the event stream, inference, and a few routes of our own."""
