"""Bootable images as verbs: what a Session adds to `images`, which knows neither repositories nor points.

targets    hardware that images are made for, kept in the repository
templates  made beforehand, kept in the repository, unpacked in the cache of this home
drivers    packages of kernel modules, kept in the repository
readers    what reads guests that are not on ext4: libguestfs' appliance, in the cache of this home
making     a point, a target and a template become a plan and an image
"""
