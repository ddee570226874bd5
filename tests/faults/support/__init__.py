"""Children to be killed, disks to be filled, and the records that their work is compared with."""
