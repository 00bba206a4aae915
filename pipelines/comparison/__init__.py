"""The comparison of methods: pipelines/compare.py in parts. It uses olora_ray, which never imports it.

Its log lines go where those of olora_ray go, so all modules write to the logger `olora_ray.comparison`.
"""
