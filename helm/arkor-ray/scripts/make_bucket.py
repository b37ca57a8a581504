# Makes the bucket of the chart's own object store, unless it is there. Run by a hook with the image's boto3.
import os
import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

bucket, region = os.environ["BUCKET"], os.environ["AWS_DEFAULT_REGION"]
# S3 refuses to be told its first region by name, and any other not to be.
where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
s3 = boto3.client("s3", endpoint_url=os.environ["ENDPOINT"])
deadline = time.monotonic() + 600
while True:
    try:
        s3.create_bucket(Bucket=bucket, **where)
        print(f"made bucket {bucket}")
        break
    except ClientError as error:
        if error.response["Error"]["Code"] in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            print(f"bucket {bucket} is there")
            break
        reason = error
        waits = error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500
    except BotoCoreError as error:
        reason, waits = error, True
    if not waits or time.monotonic() > deadline:
        sys.exit(f"bucket {bucket} could not be made: {reason}")
    print(f"waiting: {reason}", flush=True)
    time.sleep(5)
