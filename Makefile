# Each target is a line or two; the work is in scripts/.   PROFILE=dev builds the proxy quickly, for daily work.
PROFILE ?= release
FOR ?=

.PHONY: demo test e2e images install lint fmt gen bench wheels lock

demo: install
	@.venv/bin/mantle demo $(if $(FOR),--for $(FOR))

test: install
	@.venv/bin/python scripts/test.py

e2e: install
	@.venv/bin/python scripts/e2e.py

install:
	@scripts/install.sh $(PROFILE)

lint: install
	@scripts/lint.sh

fmt: install
	@scripts/fmt.sh

gen: install
	@.venv/bin/python scripts/gen.py
	@.venv/bin/python scripts/docs.py

bench: install
	@scripts/bench.sh

wheels: install
	@scripts/wheels.sh

images: install
	@.venv/bin/python images/build.py --profile $(PROFILE)

lock: install
	@scripts/lock.sh
