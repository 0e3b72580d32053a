"""Pictures of an evaluation's page for the docs: `python scripts/page_pictures.py PAGE.html FOLDER` writes evaluate_wide.png,
evaluate_phone.png, evaluate_prompt.png and evaluate_vote.png. Needs Chromium, its driver and the extra `browser`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

VIEWS = {  # name: (width, height, the button that is pressed first)
    "wide": (1200, 1500, None),
    "phone": (390, 1500, None),
    "prompt": (1200, 900, "#cards .open"),
    "vote": (1200, 900, "#vote-start"),
}


def main() -> None:
    from selenium import webdriver

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for name in VIEWS:
            picture(driver, arguments.page, name, arguments.folder / f"evaluate_{name}.png")
    finally:
        driver.quit()


def picture(driver: Any, page: Path, view: str, path: Path) -> None:
    width, height, button = VIEWS[view]
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.resolve().as_uri())
    if button:
        driver.find_element("css selector", button).click()
    driver.save_screenshot(str(path))


if __name__ == "__main__":
    main()
