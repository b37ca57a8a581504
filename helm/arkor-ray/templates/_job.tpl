{{/* A pod of ours that runs once: dict root, component, resources, env, command, mounts nothing but /tmp. */}}
{{- define "arkor-ray.jobPod" -}}
{{- $root := .root -}}
metadata:
  labels: {{- include "arkor-ray.selector" . | nindent 4 }}
spec:
  restartPolicy: Never
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {{- include "arkor-ray.podSecurityContext" $root.Values.podSecurity | nindent 4 }}
  containers:
    - name: {{ .component }}
      image: {{ include "arkor-ray.image" (dict "root" $root "tag" (default $root.Values.podDefaults.imageTag $root.Values.head.imageTag)) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "arkor-ray.securityContext" $root | nindent 8 }}
      command: {{- toYaml .command | nindent 8 }}
      env:
        - {name: HOME, value: /tmp}
        {{- with .env }}{{ . | nindent 8 }}{{ end }}
      resources: {{- include "arkor-ray.plainResources" .resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
{{- end }}
