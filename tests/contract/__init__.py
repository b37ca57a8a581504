"""The arkor wire on a running service.

A package, unlike the other folders of tests: pytest then ends the service with the last test in here.
"""
