"""What `arkor-ray doctor` looks at: each module checks one thing and says what it found and what to do about it.

Nothing here needs more than the base install to be imported, and no check starts or changes anything but objects of its own
in storage, which it removes.
"""
