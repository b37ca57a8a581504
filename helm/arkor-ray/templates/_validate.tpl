{{/*
What the schema cannot say: values that contradict each other, or would make an install that looks well and is not. Every check
prints a line for each problem, which names the value and the remedy; all of them are told at once (validate.yaml).
*/}}

{{- define "arkor-ray.validate" -}}
{{- $problems := list -}}
{{- range list "Image" "Name" "Stores" "Secrets" "Ingress" "Models" "Kueue" "Groups" "Roles" "Api" "Gpus" "Pods" -}}
{{- $problems = append $problems (include (printf "arkor-ray.validate%s" .) $) -}}
{{- end -}}
{{- with join "" $problems -}}{{- fail . -}}{{- end -}}
{{- end }}

{{- define "arkor-ray.problem" }}
- {{ . }}
{{- end }}

{{- define "arkor-ray.validateImage" -}}
{{- if not .Values.image.repository -}}
{{- include "arkor-ray.problem" "image.repository: name the image that was made from cluster/Dockerfile, such as registry.example.com/arkor-ray" -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateName" -}}
{{- $name := include "arkor-ray.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
{{- include "arkor-ray.problem" (printf "%s cannot be the name of a Ray cluster, which is of a-z, 0-9 and - and begins with a letter: choose another name for the release, or fullnameOverride" $name) -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateStores" -}}
{{- $v := .Values -}}
{{- $s3 := $v.storage -}}
{{- $redis := $v.gcsFaultTolerance -}}
{{- include "arkor-ray.exactlyOne" (dict "what" "A PostgreSQL" "ours" $v.postgresql.enabled "yours" $v.database.existingSecret.name "oursPath" "postgresql.enabled=true" "yoursPath" "database.existingSecret.name (its key url: postgresql://USER:PASSWORD@HOST/DATABASE)") -}}
{{- include "arkor-ray.exactlyOne" (dict "what" "An S3 storage" "ours" $v.objectStore.enabled "yours" $s3.url "oursPath" "objectStore.enabled=true" "yoursPath" "storage.url (s3://BUCKET/PREFIX)") -}}
{{- if and $s3.url (not $s3.existingSecret.name) (not $s3.workloadIdentity) -}}
{{- include "arkor-ray.problem" "storage.existingSecret.name: name the Secret with the keys for storage.url, or set storage.workloadIdentity=true and give the role in serviceAccount.annotations" -}}
{{- end -}}
{{- if $redis.enabled -}}
{{- include "arkor-ray.exactlyOne" (dict "what" "A Redis, in which Ray's state outlives its head," "ours" $v.redis.enabled "yours" $redis.redisAddress "oursPath" "redis.enabled=true" "yoursPath" "gcsFaultTolerance.redisAddress (or set gcsFaultTolerance.enabled=false)") -}}
{{- if and $redis.redisAddress (not $redis.existingSecret.name) -}}
{{- include "arkor-ray.problem" "gcsFaultTolerance.existingSecret.name: name the Secret with the password of gcsFaultTolerance.redisAddress; a Redis without one lets anybody who reaches it run code in the Ray cluster" -}}
{{- end -}}
{{- end -}}
{{- range list
  (list "storage.endpointUrl" "objectStore.enabled=true" (and $v.objectStore.enabled $s3.endpointUrl))
  (list "storage.existingSecret.name" "objectStore.enabled=true" (and $v.objectStore.enabled $s3.existingSecret.name))
  (list "storage.workloadIdentity=true" "objectStore.enabled=true" (and $v.objectStore.enabled $s3.workloadIdentity))
  (list "storage.existingSecret.name" "storage.workloadIdentity=true" (and $s3.workloadIdentity $s3.existingSecret.name))
  (list "redis.enabled=true" "gcsFaultTolerance.enabled=false" (and $v.redis.enabled (not $redis.enabled)))
  (list "gcsFaultTolerance.redisAddress" "gcsFaultTolerance.enabled=false" (and $redis.redisAddress (not $redis.enabled)))
  (list "gcsFaultTolerance.existingSecret.name" "redis.enabled=true" (and $v.redis.enabled $redis.existingSecret.name))
-}}
{{- if index . 2 -}}
{{- include "arkor-ray.problem" (printf "%s has no use with %s: leave one out" (index . 0) (index . 1)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.exactlyOne" -}}
{{- if and .ours .yours -}}
{{- include "arkor-ray.problem" (printf "%s is given twice: %s and %s; leave one out" .what .oursPath .yoursPath) -}}
{{- else if not (or .ours .yours) -}}
{{- include "arkor-ray.problem" (printf "%s is needed: give yours by %s; for a try-out %s makes a small one" .what .yoursPath .oursPath) -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateSecrets" -}}
{{- $v := .Values -}}
{{- if and $v.rayAuth.existingSecret $v.rayAuth.token -}}
{{- include "arkor-ray.problem" "Ray's token is given twice: rayAuth.existingSecret and rayAuth.token; leave one out" -}}
{{- end -}}
{{- range $path, $value := dict "rayAuth.token" $v.rayAuth.token "postgresql.password" $v.postgresql.password "redis.password" $v.redis.password "objectStore.secretKey" $v.objectStore.secretKey -}}
{{- if $value -}}
{{- $plain := regexReplaceAll "[^a-z0-9]" (lower $value) "" -}}
{{- if regexMatch "^(my|your|the|some|a)?(changeit|changeme|changethis|replaceme|placeholder|example|dummy|test|todo|default|admin|root|minio|postgres|redis|arkor|ray|secret|password|passwd|passw0rd|token|key|x+|[0-9]+)+$" $plain -}}
{{- include "arkor-ray.problem" (printf "%s is a placeholder that anybody would guess: leave it out and one is made, or give a random one (openssl rand -hex 24)" $path) -}}
{{- else if lt (len $value) 16 -}}
{{- include "arkor-ray.problem" (printf "%s has %d characters: give at least 16 random ones (openssl rand -hex 24), or leave it out and one is made" $path (len $value)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateIngress" -}}
{{- $v := .Values -}}
{{- if $v.ingress.enabled -}}
{{- if not $v.ingress.host -}}
{{- include "arkor-ray.problem" "ingress.host: the name by which clients reach the API, such as arkor.example.com" -}}
{{- end -}}
{{- if not (or $v.ingress.tls.secretName $v.ingress.allowHttp) -}}
{{- include "arkor-ray.problem" "ingress.tls.secretName: name the certificate's Secret; tokens must not travel in clear. Where TLS ends in front of this ingress, set ingress.allowHttp=true" -}}
{{- end -}}
{{- if and $v.endpoints.domain $v.ingress.tls.secretName (not $v.ingress.tls.endpointsSecretName) -}}
{{- include "arkor-ray.problem" (printf "ingress.tls.endpointsSecretName: name the Secret with the certificate of *.%s (endpoints.domain)" $v.endpoints.domain) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* As arkor_ray/catalogue.py, which would refuse to start. */}}
{{- define "arkor-ray.validateModels" -}}
{{- $seen := dict -}}
{{- range .Values.models -}}
{{- $source := default .name .source -}}
{{- if not (or (hasPrefix "/" $source) (hasPrefix "s3://" $source) (regexMatch "^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$" $source)) -}}
{{- include "arkor-ray.problem" (printf "models: %q is not a Hub id (owner/name), an absolute directory or s3://BUCKET/PREFIX: correct it, or say in source where %q is" $source .name) -}}
{{- end -}}
{{- range $name := prepend (.aliases | default list) .name -}}
{{- if hasKey $seen (lower $name) -}}
{{- include "arkor-ray.problem" (printf "models: %q is there twice, as a name or an alias; upper and lower case do not matter: choose another for one of them" $name) -}}
{{- end -}}
{{- $_ := set $seen (lower $name) true -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateKueue" -}}
{{- $kueue := .Values.kueue -}}
{{- if and $kueue.queueName .Values.autoscaling.enabled (not $kueue.elastic) -}}
{{- include "arkor-ray.problem" "kueue.queueName with autoscaling.enabled=true: Kueue admits a cluster of a fixed size; set autoscaling.enabled=false, or kueue.elastic=true where Kueue has the feature gate ElasticJobsViaWorkloadSlices" -}}
{{- end -}}
{{- if and (or $kueue.priorityClass $kueue.elastic) (not $kueue.queueName) -}}
{{- include "arkor-ray.problem" "kueue.queueName: name the LocalQueue; kueue.priorityClass and kueue.elastic have no use without it" -}}
{{- end -}}
{{- end }}
