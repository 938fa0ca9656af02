"""Manifests that several plays are given."""

WEB = """\
# the shop's front
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web   # keep me
spec:
  template:
    metadata:
      labels: {app: web}
    spec:
      containers:
      - image: 'acme/web:1.4'
        name: web
"""
