"""The vocabulary of the service: pydantic models, snake_case in Python, the arkor wire's camelCase in JSON."""
