# Makes the bucket of the chart's own object store, unless it is there. Run by a hook with the image's boto3.
import os
import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

bucket = os.environ["BUCKET"]
s3 = boto3.client("s3", endpoint_url=os.environ["ENDPOINT"], config=Config(s3={"addressing_style": "path"}))
deadline = time.monotonic() + 600
while True:
    try:
        s3.create_bucket(Bucket=bucket)
        print(f"made bucket {bucket}")
        break
    except ClientError as error:
        if error.response["Error"]["Code"] in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            print(f"bucket {bucket} is there")
            break
        reason = error
    except BotoCoreError as error:
        reason = error
    if time.monotonic() > deadline:
        sys.exit(f"bucket {bucket} could not be made: {reason}")
    print(f"waiting: {reason}", flush=True)
    time.sleep(5)
