"""The slot engine: one base model, many adapters beside it, all requests in one continuous batch."""
