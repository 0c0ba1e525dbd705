"""A process that has all of vmnet imported, and does by a fork of itself what a client asks for.

For root a fork becomes the client: its arguments, descriptors, environment and folder, and then the same main().
Anybody else speaks the typed protocol of `vmnet.requests`. `listening` has the socket, `peers` knows who asks, `spares`
has forks that wait for work, `jobs` is what they do, and `loop` is the process that forks.
"""
