"""The comparison of methods: the parts of `olora-ray compare`. It uses olora_ray, which never imports it.

All modules log to `olora_ray.comparison`, so that their lines appear with those of olora_ray.
"""
