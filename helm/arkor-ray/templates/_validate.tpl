{{/*
What the schema cannot say: values that contradict each other, or would make an install that looks well and is not. Each
refusal names the value and the remedy.
*/}}

{{- define "arkor-ray.validate" -}}
{{- include "arkor-ray.validateName" . -}}
{{- include "arkor-ray.validateStores" . -}}
{{- include "arkor-ray.validateIngress" . -}}
{{- include "arkor-ray.validateEnv" . -}}
{{- include "arkor-ray.validateGroups" . -}}
{{- end }}

{{- define "arkor-ray.validateName" -}}
{{- $name := include "arkor-ray.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
{{- fail (printf "%s cannot be the name of a Ray cluster, which is of a-z, 0-9 and - and begins with a letter: choose another name for the release, or fullnameOverride" $name) -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateStores" -}}
{{- $v := .Values -}}
{{- include "arkor-ray.exactlyOne" (dict "what" "A PostgreSQL" "ours" $v.postgresql.enabled "yours" $v.database.existingSecret.name "oursPath" "postgresql.enabled=true" "yoursPath" "database.existingSecret.name (its key url: postgresql://USER:PASSWORD@HOST/DATABASE)") -}}
{{- include "arkor-ray.exactlyOne" (dict "what" "An S3 storage" "ours" $v.objectStore.enabled "yours" $v.storage.url "oursPath" "objectStore.enabled=true" "yoursPath" "storage.url (s3://BUCKET/PREFIX)") -}}
{{- if and $v.storage.url (not $v.storage.existingSecret.name) (not $v.storage.workloadIdentity) -}}
{{- fail "storage.existingSecret.name: name the Secret with the keys for storage.url, or set storage.workloadIdentity=true and give the role in serviceAccount.annotations" -}}
{{- end -}}
{{- if $v.gcsFaultTolerance.enabled -}}
{{- include "arkor-ray.exactlyOne" (dict "what" "A Redis, in which Ray's state outlives its head," "ours" $v.redis.enabled "yours" $v.gcsFaultTolerance.redisAddress "oursPath" "redis.enabled=true" "yoursPath" "gcsFaultTolerance.redisAddress (or set gcsFaultTolerance.enabled=false)") -}}
{{- if and $v.gcsFaultTolerance.redisAddress (not $v.gcsFaultTolerance.existingSecret.name) -}}
{{- fail "gcsFaultTolerance.existingSecret.name: name the Secret with the password of gcsFaultTolerance.redisAddress; a Redis without one lets anybody who reaches it run code in the Ray cluster" -}}
{{- end -}}
{{- else if $v.redis.enabled -}}
{{- fail "redis.enabled=true has no use with gcsFaultTolerance.enabled=false: choose" -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.exactlyOne" -}}
{{- if and .ours .yours -}}
{{- fail (printf "%s is given twice: %s and %s; leave one out" .what .oursPath .yoursPath) -}}
{{- else if not (or .ours .yours) -}}
{{- fail (printf "%s is needed: give yours by %s; for a try-out %s makes a small one" .what .yoursPath .oursPath) -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateIngress" -}}
{{- $v := .Values -}}
{{- if $v.ingress.enabled -}}
{{- $_ := required "ingress.host: the name by which clients reach the API, such as arkor.example.com" $v.ingress.host -}}
{{- if not (or $v.ingress.tls.secretName $v.ingress.allowHttp) -}}
{{- fail "ingress.tls.secretName: name the certificate's Secret; tokens must not travel in clear. Where TLS ends in front of this ingress, set ingress.allowHttp=true" -}}
{{- end -}}
{{- if and $v.endpoints.domain $v.ingress.tls.secretName (not $v.ingress.tls.endpointsSecretName) -}}
{{- fail (printf "ingress.tls.endpointsSecretName: name the Secret with the certificate of *.%s (endpoints.domain)" $v.endpoints.domain) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateEnv" -}}
{{- $lists := list .Values.extraEnv .Values.podDefaults.extraEnv (.Values.head.extraEnv | default list) -}}
{{- range .Values.workerGroups -}}{{- $lists = append $lists (.extraEnv | default list) -}}{{- end -}}
{{- range $list := $lists -}}
{{- range $list -}}
{{- if regexMatch "^(ARKOR_RAY_|RAY_AUTH_|REDIS_|RAY_REDIS_ADDRESS$)" .name -}}
{{- fail (printf "extraEnv: %s is set by the chart; give it by the value it belongs to (settings, database, storage, rayAuth, gcsFaultTolerance)" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "arkor-ray.validateGroups" -}}
{{- $minimum := 0 -}}
{{- $maximum := 0 -}}
{{- $groups := include "arkor-ray.groups" . | fromJsonArray -}}
{{- range prepend $groups (set (deepCopy .Values.head) "path" "head") -}}
{{- $resources := .resources | default dict -}}
{{- if not (and ($resources.requests | default dict).cpu ($resources.limits | default dict).memory) -}}
{{- fail (printf "%s.resources: give requests.cpu and limits.memory; Ray counts by them what a pod has room for" (.path | default (printf "workerGroups.%s" .name))) -}}
{{- end -}}
{{- end -}}
{{- range $groups -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "workerGroups.%s: minReplicas %d is more than maxReplicas %d" .name (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- $minimum = add $minimum (mul (int .minReplicas) (int .gpus)) -}}
{{- $maximum = add $maximum (mul (int .maxReplicas) (int .gpus)) -}}
{{- end -}}
{{- if not $groups -}}
{{- fail "workerGroups: every group has maxReplicas 0, and the head takes no work: nothing could run" -}}
{{- end -}}
{{- if .Values.nodeRoles -}}
{{- range $role := list "control-plane" "training" "serving" -}}
{{- $has := dict -}}
{{- range $groups -}}{{- if eq (.role | default "") $role -}}{{- $_ := set $has $role true -}}{{- end -}}{{- end -}}
{{- if not $has -}}
{{- fail (printf "workerGroups: nodeRoles=true and no group with role %s has pods, so that nothing of it could run; give a group that role, or set nodeRoles=false" $role) -}}
{{- end -}}
{{- end -}}
{{- range $groups -}}
{{- if not .role -}}
{{- fail (printf "workerGroups.%s: nodeRoles=true and the group has no role, so that nothing would run there; give it one (control-plane, training or serving), or set nodeRoles=false" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- /* How many GPUs a worker or a replica asks for is decided by how many the cluster has at that moment. */ -}}
{{- if and (gt $maximum 0) (eq $minimum 0) -}}
{{- fail (printf "workerGroups: there may be %d GPUs but none needs to be (minReplicas): while there is none, jobs train and models answer on CPUs and never ask for one; set minReplicas of a group with GPUs" $maximum) -}}
{{- end -}}
{{- if and (gt $maximum 1) (eq $minimum 1) -}}
{{- fail (printf "workerGroups: there may be %d GPUs but only one needs to be (minReplicas): while there is just one, training and serving share it (0.6 and 0.4) and never ask for another; have at least two, or set maxReplicas so that there is one for ever" $maximum) -}}
{{- end -}}
{{- if and .Values.kueue.queueName .Values.autoscaling.enabled (not .Values.kueue.elastic) -}}
{{- fail "kueue.queueName with autoscaling.enabled=true: Kueue admits a cluster of a fixed size; set autoscaling.enabled=false, or kueue.elastic=true where Kueue has the feature gate ElasticJobsViaWorkloadSlices" -}}
{{- end -}}
{{- end }}
