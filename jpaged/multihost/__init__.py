"""One engine over the devices of several hosts, with a process on each.

Rank 0, the leader, has scheduler, block manager and server, and devices of its own. The others have
nothing but devices: they repeat each of the leader's calls to its `DeviceWorker`, in their order.
"""

from jpaged.multihost.follower import follow as follow
