"""The command line, `arkor-ray`. It talks to a service only through `arkor_ray.client`."""
